"""lark-fast inside other people's programs: under their names, flags and formats."""
