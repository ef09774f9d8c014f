"""A record becomes the token ids a student reads, and which of them are scored (``renderer``).

``templates`` finds the assistant's turns in what a chat template writes; ``inspection`` shows them to a reader.
"""
