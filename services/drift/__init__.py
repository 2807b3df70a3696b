"""The drift service: does a model still see, and still get right, what it was trained on?"""
