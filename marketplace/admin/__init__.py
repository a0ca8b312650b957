"""Two admin sites on django-unfold: the operators', narrowed to their own organization, and our own people's."""
