"""lark-fast inside other people's programs."""
