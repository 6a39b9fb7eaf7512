"""Do layers that merge their experts learn better, and is it the metric or the learning rate?"""
