"""Sample from a policy, locally or from servers, and judge what it wrote."""
