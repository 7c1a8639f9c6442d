"""What the models and operations of the API have in common.

The API's models are its own, so that it can stay as it is when the code behind it changes.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from leukoflow.apps.web.api.problems import documented


class Model(BaseModel):
    """Base of everything that the API returns."""

    model_config = ConfigDict(from_attributes=True)


COMMON = documented(400, 401, 403, 422)
FOUND = COMMON | documented(404)
