"""Studies: what an experiment measured, as records, tables, sentences and files."""
