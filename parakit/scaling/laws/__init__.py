"""Laws of scaling: their formulas, their fit to what was measured, and the choice between them."""
