"""Exit codes of the commands that are no error of rlspec's own (those carry theirs, see rlspec.errors)."""

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
