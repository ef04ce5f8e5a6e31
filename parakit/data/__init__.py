"""Data: samples, the chunks that they are cut into, and who owns which."""
