"""lark-fast under the names, flags and formats of other code bases."""
