"""The report: one page that shows what was scored, what was selected, and what came of it."""
