"""The operator: thin handlers around what planning decides."""
