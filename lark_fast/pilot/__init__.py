"""``lark-fast pilot``: which selection makes this student better, before a training run is spent on it?"""
