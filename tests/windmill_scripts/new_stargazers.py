#requirements:
#wmill
#httpx

import httpx
from wmill import Windmill


def main(url: str):
    """The difference between who is there and who was there."""
    client = Windmill()
    known = client.state or []
    logins = [row["name"] for row in httpx.get(url).json()]
    client.state = logins
    return [{"id": login, "login": login} for login in logins if login not in known]
