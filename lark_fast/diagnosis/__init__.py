"""``lark-fast diagnose``: does g_hat order trajectories as the student's own gradients do?"""
