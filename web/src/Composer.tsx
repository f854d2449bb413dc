import { useEffect, useRef, useState } from "react"
import { recall, remember } from "./storage"
import { text } from "./text"
import type { Chat } from "./useChat"

export function Composer({ chat }: { chat: Chat }) {
  const [draft, setDraft] = useState(() => recall("draft", ""))
  const area = useRef<HTMLTextAreaElement>(null)
  const ready = chat.engineState.state === "ready" && !chat.running

  useEffect(() => remember("draft", draft.length < 200_000 ? draft : ""), [draft])
  useEffect(() => area.current?.focus(), [chat.talk.id])
  useEffect(() => { // as high as its text
    const element = area.current!
    element.style.height = "auto"
    element.style.height = `${Math.min(element.scrollHeight + 2, innerHeight / 3)}px`
  }, [draft])

  const send = () => {
    if (!ready || !draft.trim()) return
    chat.say(draft)
    setDraft("")
  }

  return (
    <form className="composer" onSubmit={event => { event.preventDefault(); send() }}>
      <textarea ref={area} rows={1} aria-label={text.typeHere} placeholder={text.typeHere} value={draft}
        aria-describedby="hint" onChange={event => setDraft(event.target.value)}
        onKeyDown={event => {
          if (event.key !== "Enter" || event.shiftKey || event.nativeEvent.isComposing) return
          event.preventDefault()
          send()
        }} />
      {chat.running
        ? <button type="button" className="primary" onClick={() => { chat.stop(); area.current?.focus() }}>{text.stop}</button>
        : <button className="primary" disabled={!ready || !draft.trim()}>{text.send}</button>}
      <p id="hint" className="help">{text.hint}</p>
    </form>
  )
}
