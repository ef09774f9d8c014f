"""Trajectories in, statistics out.

``scorer`` runs the student; ``learnability`` makes rho and g_hat; ``store`` keeps them on disk, in ``parts`` and a
``journal``, under a ``lock``; ``finishing`` is its last step; ``run`` is ``lark-fast score``; ``export`` writes other
programs' formats.
"""
