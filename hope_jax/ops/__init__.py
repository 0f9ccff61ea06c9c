"""Pure functions of arrays: memories, losses, convolutions, each in one or several forms."""
