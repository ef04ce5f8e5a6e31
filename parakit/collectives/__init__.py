"""Groups of workers that add vectors together: through memory that they share, over connections, or both."""
