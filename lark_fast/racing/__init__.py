"""Scoring as a race: a problem's candidates are scored in growing pieces, and those that cannot win stop early."""
