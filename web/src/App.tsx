import { useEffect, useRef, useState } from "react"
import { Composer } from "./Composer"
import { transcript } from "./conversations"
import { Confirm } from "./Dialog"
import { Messages } from "./Messages"
import { SettingsDialog } from "./SettingsDialog"
import { Sidebar, download } from "./Sidebar"
import { text } from "./text"
import { useChat, type Chat } from "./useChat"

export function App() {
  const chat = useChat()
  const [menu, setMenu] = useState(false) // on a phone: whether the list is shown
  const [settings, setSettings] = useState(false)
  const { theme } = chat.settings

  useEffect(() => {
    document.documentElement.dataset.theme = theme
  }, [theme])

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return
      if (menu) setMenu(false)
      else if (chat.running) chat.stop()
    }
    addEventListener("keydown", onKey)
    return () => removeEventListener("keydown", onKey)
  }, [menu, chat])

  return (
    <div className="app">
      <Sidebar chat={chat} shown={menu} close={() => setMenu(false)} />
      <main>
        <Header chat={chat} menu={menu} openMenu={() => setMenu(true)} openSettings={() => setSettings(true)} />
        <Messages chat={chat} openSettings={() => setSettings(true)} />
        <Composer chat={chat} />
      </main>
      {settings && <SettingsDialog chat={chat} close={() => setSettings(false)} />}
      <div role="status" className="hidden">{chat.notice}</div>
    </div>
  )
}

function Header({ chat, menu, openMenu, openSettings }:
    { chat: Chat, menu: boolean, openMenu: () => void, openSettings: () => void }) {
  const { talk, talks } = chat
  const [renaming, setRenaming] = useState(false)
  const [removing, setRemoving] = useState(false)
  const rename = useRef<HTMLButtonElement>(null)
  const stored = talk.id in talks

  const finish = (title?: string) => {
    if (title?.trim()) chat.update(talk, { title: title.trim().slice(0, 200) })
    setRenaming(false)
    setTimeout(() => rename.current?.focus())
  }

  return (
    <header>
      <button className="menu" aria-expanded={menu} aria-label={text.menu} onClick={openMenu}>☰</button>
      <div className="titles">
        {renaming
          ? <input autoFocus aria-label={text.renameLabel} defaultValue={talk.title}
              onFocus={event => event.target.select()} onBlur={event => finish(event.target.value)}
              onKeyDown={event => {
                if (event.key === "Enter") finish(event.currentTarget.value)
                if (event.key === "Escape") finish()
              }} />
          : <h1>{talk.title}</h1>}
        <EngineLine chat={chat} />
      </div>
      {stored && <>
        <button ref={rename} onClick={() => setRenaming(true)}>{text.rename}</button>
        <button onClick={() => download(`${talk.title}.json`, JSON.stringify(transcript(talk), null, 1))}>
          {text.exportOne}</button>
        <button onClick={() => setRemoving(true)}>{text.remove}</button>
      </>}
      <button onClick={openSettings}>{text.settings}</button>
      {removing && <Confirm title={text.removeTitle} body={text.removeBody(talk.title)} action={text.remove}
        close={() => setRemoving(false)} confirm={() => chat.remove([talk.id])} />}
    </header>
  )
}

/** Which model answers, or how far it has come. */
function EngineLine({ chat: { engineState: engine } }: { chat: Chat }) {
  if (engine.state === "loading") {
    const { done, total } = engine
    return <p className="engine">{total !== null && done >= total ? text.opening : text.loading(done, total)}{" "}
      <progress aria-label={text.loading(done, total)} value={total ? done / total : undefined} /></p>
  }
  if (engine.state === "finding") return <p className="engine">{text.finding}…</p>
  if (engine.state === "failed") return <p className="engine">{text.failed}</p>
  const { name, place, slow } = engine.info
  return <p className="engine">{text.ready(name, text.places[place])}{slow && ` · ${text.slow}`}</p>
}
