"""`vnaw bench`: what every stage costs, as ratios within one run, on synthetic data of any size."""
