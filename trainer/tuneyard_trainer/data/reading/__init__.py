"""Data sets as rows and checked examples, without torch and without a tokenizer.

`rows` reads files, `layouts` lists the layouts of rows with their readers (`readers`, `turns`,
`trees`, `feedback`), and `stream` yields a data set's examples (`example`) and counts its rows.
It may not hold what a job makes of the examples.
"""
