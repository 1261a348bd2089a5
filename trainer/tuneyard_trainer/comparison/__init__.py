"""`tuneyard compare`: several finished jobs beside each other.

It reads outputs, compares their metrics item by item, and writes a document and a page. It runs no
model, and it needs no torch. It may not change an output.
"""
