import { useEffect, useRef, useState } from "react"
import { search, transcript } from "./conversations"
import { text } from "./text"
import type { Chat } from "./useChat"

/** Hand the user a file. */
export function download(name: string, content: string): void {
  const link = document.createElement("a")
  link.href = URL.createObjectURL(new Blob([`${content}\n`], { type: "application/json" }))
  link.download = name.replace(/[\\/:*?"<>|\p{Cc}]+/gu, " ").trim() || "conversation.json"
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 1000)
}

export function Sidebar({ chat, shown, close }: { chat: Chat, shown: boolean, close: () => void }) {
  const [query, setQuery] = useState("")
  const file = useRef<HTMLInputElement>(null)
  const nav = useRef<HTMLElement>(null)
  const was = useRef(false)
  useEffect(() => { // on a phone the focus goes into the list, and back
    if (shown) nav.current!.querySelector("button")!.focus()
    else if (was.current) document.querySelector<HTMLElement>("header .menu")?.focus()
    was.current = shown
  }, [shown])
  const all = Object.values(chat.talks)
  const found = search(all, query)

  const exportAll = () => download("conversations.jsonl",
    search(all, "").map(transcript).filter(one => one.messages.length).map(one => JSON.stringify(one)).join("\n"))

  return <>
    {shown && <div className="backdrop" onClick={close} />}
    <nav ref={nav} className={shown ? "shown" : ""} aria-label={text.conversations}>
      <div className="row">
        <button className="primary grow" onClick={() => { chat.begin(); close() }}>{text.newChat}</button>
        <button className="menu" aria-label={text.closeMenu} onClick={close}>×</button>
      </div>
      <input type="search" aria-label={text.search} placeholder={text.search} value={query}
        onChange={event => setQuery(event.target.value)} />
      <ul>
        {found.map(talk => (
          <li key={talk.id}>
            <button aria-current={talk.id === chat.talk.id || undefined} title={talk.title}
              onClick={() => { chat.open(talk.id); close() }}>{talk.title}</button>
          </li>))}
      </ul>
      {!found.length && <p className="help">{query ? text.nothingFound(query) : text.noConversations}</p>}
      <div className="row">
        <button className="grow" onClick={() => file.current!.click()}>{text.importFiles}</button>
        <button className="grow" disabled={!all.length} onClick={exportAll}>{text.exportAll}</button>
        <input ref={file} type="file" hidden multiple accept=".json,.jsonl,application/json"
          aria-label={text.importFiles} onChange={async event => {
            const { files } = event.target
            if (files?.length && await chat.importFiles([...files])) close()
            event.target.value = ""
          }} />
      </div>
    </nav>
  </>
}
