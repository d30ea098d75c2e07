"""Result rows as one HTML page, and its figures for a paper."""
