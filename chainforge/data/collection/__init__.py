"""Stage 0: collect chain-of-thought from a teacher."""
