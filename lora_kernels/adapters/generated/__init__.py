"""Methods whose factors are shared, generated or chosen."""
