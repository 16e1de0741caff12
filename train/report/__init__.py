"""A run as one HTML page, or several beside one another; `python -m train.report`."""
