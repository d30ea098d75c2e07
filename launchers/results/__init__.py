"""What is made of rows: one frame, then tables, figures and pages."""
