"""The data plane: reads a Plan and carries out its stages with torch, transformers and PEFT.

What lives here: the runner, the records, the stages and what they share. What may not enter: the
planner, the controller, kopf. `distributed` holds the only Ray code; every stage also runs under a
plain launcher. Importing this package imports no torch: modules that need it import it themselves.
"""
