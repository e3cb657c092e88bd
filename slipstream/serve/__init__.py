"""How are models served over HTTP?"""
