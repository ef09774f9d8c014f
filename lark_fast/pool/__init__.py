"""Pools in: paths become files, files become raw records, raw records become ``Record`` or a reject with its reason.

files -> decoding -> splitting, json_list, parquet_rows -> records; ``reading`` drives them, ``keys`` remembers what was
met.
"""
