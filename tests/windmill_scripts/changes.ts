import wmill from "windmill-client";
import { createHash } from "crypto";

export async function main(url: string) {
  const path = wmill.getStatePath();
  if (!path) throw new Error("no state path");
  const hashes: Record<string, string> = (await wmill.getState()) ?? {};
  const rows: { id: number }[] = await (await fetch(url)).json();
  const changed = [];
  for (const row of rows) {
    const hash = createHash("sha256").update(JSON.stringify(row)).digest("hex");
    if (hashes[row.id] !== hash) {
      hashes[row.id] = hash;
      changed.push(row);
    }
  }
  await wmill.setState(hashes);
  return changed;
}
