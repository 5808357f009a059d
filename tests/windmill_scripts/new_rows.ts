import { getState, setState } from "windmill-client";

export async function main(url: string) {
  const lastId: number = (await getState()) ?? 0;
  const rows: { id: number }[] = await (await fetch(url)).json();
  const fresh = rows.filter((row) => row.id > lastId);
  if (fresh.length > 0) {
    await setState(Math.max(...fresh.map((row) => row.id)));
  }
  return fresh;
}
