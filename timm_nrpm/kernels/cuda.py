"""placeholder"""


def serves(x):
    return False
