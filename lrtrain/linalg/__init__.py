"""Linear algebra of matrices and factors: singular values, nearest factors, random draws, the cosine transform."""
