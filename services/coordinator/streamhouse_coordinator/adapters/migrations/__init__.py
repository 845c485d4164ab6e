"""SQL of the migrations, applied in the order of their names."""
