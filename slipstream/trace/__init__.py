"""What did an engine do, drawn over time?"""
