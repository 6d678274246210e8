"""effkern under the names of other libraries: `sdpa`, `transformers`, `flash_attn`.

Nothing here is imported by `import effkern`, and importing one of the modules changes nothing either: the libraries are
imported and told about effkern by the functions that the user calls.
"""
