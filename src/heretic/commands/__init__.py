"""What the command line can ask for, a module each. `start` checks it; the others, but `classify`, are imported only then.

Imports nothing: `--help` answers at once.
"""

# What the first argument may ask for besides a run: the function that takes the other arguments.
COMMANDS = {
    "classify": "heretic.commands.classify:command",
    "compare": "heretic.commands.start:compare",
    "worker": "heretic.commands.start:worker",
}
# Options that ask for a result to be made again instead of a run.
REBUILD_FLAGS = ("--export-from", "--reproduce", "--reproduce-search")
