"""What the questions share: models, records, times and bytes, pages."""
