"""What people take out of a pool before they select from it: near duplicates, and items of a benchmark.

``texts`` says in which form texts are compared; ``duplicates`` and ``decontamination`` are filters: they see every
scored record once, in the order of the pool, and then say which have to go; ``benchmark`` reads the items.
"""

from lark_fast.selection.hygiene.removals import Removal, removed_entry

__all__ = ["Removal", "removed_entry"]
