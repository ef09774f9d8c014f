"""Trajectories in, statistics out.

``scorer`` runs the student; ``learnability`` makes rho and g_hat; ``store`` keeps them on disk; ``run`` is ``lark-fast
score``; ``export`` writes other programs' formats.
"""
