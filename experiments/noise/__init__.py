"""At which noise of training do models merge best?"""
