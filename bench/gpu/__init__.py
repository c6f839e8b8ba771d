"""Everything that only a GPU can show, in one command: ``python -m bench gpu``.

Each part is a process of its own with a time limit; its result is written as soon as it ends. A part that fails, hangs or dies
does not stop the next. Run again, the command goes on where it was stopped.
"""
