"""The public functions, one module a family; `registry` knows them all."""
