"""Each method's update written down literally in float64 numpy: slow, short, and sharing nothing with the package.

`trajectory(w, gradients, ...)` returns the weights after every step, stacked.
"""
