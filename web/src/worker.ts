import * as e from "./engine"; console.log(e)
