"""Linear algebra of matrices and factors: singular values, nearest factors, random values, the cosine transform."""
