"""The commands, one module each. `start` checks the command line before the others (except `classify`) are imported.

Imports nothing, so that `--help` is fast.
"""

# Subcommands: the function that takes the other arguments.
COMMANDS = {
    "classify": "heretic.commands.classify:command",
    "compare": "heretic.commands.start:compare",
    "worker": "heretic.commands.start:worker",
}
# Options that rebuild a result instead of starting a run.
REBUILD_FLAGS = ("--export-from", "--reproduce", "--reproduce-search")
