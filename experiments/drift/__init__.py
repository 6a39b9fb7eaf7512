"""How far from the base may experts go until their merge breaks?"""
