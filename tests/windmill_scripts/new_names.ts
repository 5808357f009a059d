import * as wmill from "windmill-client";

type Site = {
  base: string;
};

export async function main(site: Site, path: string = "/items") {
  const known: string[] = (await wmill.getState()) ?? [];
  const response = await fetch(site.base + path);
  const names: string[] = (await response.json()).map((row: any) => row.name);
  await wmill.setState(names);
  return names.filter((name) => !known.includes(name)).map((name) => ({ id: name, name }));
}
